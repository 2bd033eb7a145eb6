"""The command line: what operators call, and what it prints."""
