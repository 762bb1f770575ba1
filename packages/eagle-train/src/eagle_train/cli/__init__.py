"""The command `eagle`: parsing and printing only. Whatever a verb needs is imported when it runs, so that `--help` is instant."""
