"""The shell: one command a file. A command parses, calls, prints and returns an exit code."""
