"""What people read of a run: its report, its model card, and the tables and plots in them."""
