"""Methods that the configuration brings in: entry points of other distributions, and programs."""
