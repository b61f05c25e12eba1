"""The parts of ``fastkd.compare``: rows, their budgets, their scores, and the tables and report made of them."""
