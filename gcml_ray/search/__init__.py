"""What a hyperparameter search leaves: its records, its folder, what mattered. No Ray."""
