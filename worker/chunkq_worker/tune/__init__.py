"""Find the settings with which a job runs fastest on this machine."""
