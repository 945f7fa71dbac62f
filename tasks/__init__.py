"""What becomes of trained models: kept as versions, allotted to tasks, judged by what comes back. Imports `protocol` only."""
