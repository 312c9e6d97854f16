"""Series from the files that other trainers and trackers leave: `series.read_series` opens any of them."""
