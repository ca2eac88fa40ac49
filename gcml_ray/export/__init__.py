"""A personalised model taken out of its run, in formats that others read."""
