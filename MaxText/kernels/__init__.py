"""Pure functions on arrays, each with a plain reference twin: no modules, no config."""
