"""Run networks: workers, the predictor, and the commands `work`, `tune` and `export`."""
