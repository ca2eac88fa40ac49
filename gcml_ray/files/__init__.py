"""What a run keeps on disk: its folder, records as JSON, locks, files that are written whole or not at all."""
