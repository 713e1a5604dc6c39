"""An inspection as tables, CSV, pictures and a page."""
