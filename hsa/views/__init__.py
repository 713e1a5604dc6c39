"""Views of an inspection: tables, CSV, pictures and a page."""
