"""Data: from folders, manifests, parquet files and data sets to a stream of tasks."""
