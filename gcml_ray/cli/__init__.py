"""The command line, ``gcml``: a module a command."""
