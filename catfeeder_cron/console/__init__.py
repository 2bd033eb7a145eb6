"""The command line: the commands for operators, and their output."""
