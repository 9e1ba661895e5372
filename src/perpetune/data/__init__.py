"""Data: read folders, manifests, parquet files and data sets, and make a stream of tasks from them."""
