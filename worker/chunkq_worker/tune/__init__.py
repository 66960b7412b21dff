"""Finding the settings with which a job is fastest here."""
