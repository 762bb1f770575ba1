"""From nothing to a trained tiny Eagle in minutes on a CPU: data, configuration, and every step that a real run has."""
