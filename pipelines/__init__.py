"""The graphs (one file each), and what runs, compiles, submits and schedules them."""
