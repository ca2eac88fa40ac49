"""The report page: one HTML file about a run, a comparison or a search."""
