"""Several methods on the same data: budgets, the search for learning rates, the verdict and the report."""
