"""What a person sees in a terminal: live tables while something runs, the summary at its end."""
