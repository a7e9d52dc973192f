"""What is measured: shapes, weights and inputs that all suites and peers share."""
