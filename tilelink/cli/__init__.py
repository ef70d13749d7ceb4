"""The command line: text in, text out; every command is a thin layer over the compiler's own calls."""
