"""What is found out about targets and backends, in other processes."""
