"""The command line. Each module holds one group of commands; heavy imports wait until a command runs."""
