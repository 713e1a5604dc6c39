"""The files beside the weights: records, patch files, indexes, model cards, small files and reports."""
