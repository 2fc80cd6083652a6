"""Who trains: one file per engine, each from the same recipe and prepared data to the same run directory."""
