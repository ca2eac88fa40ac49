"""Methods beside each other: finished cells and their statistics, tables and files."""
