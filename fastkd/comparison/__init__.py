"""The parts of ``fastkd.compare``. One comparison from its options to its report is in ``experiment``.

``options``     the command's own options
``rows``        a row: how --methods names it, and the runs that it means
``budgets``     the budgets that all rows get, and each row's plan
``tuning``      the search for a row's learning rate
``scores``      what a trained model is scored by
``references``  models that rows are compared with: the teachers, the untrained student
``differences`` what differs between rows besides the method: the confounds
``results``     results.json, means and differences over seeds
``items``       scores item by item, which results.json names
``intervals``   how far the difference of two rows can be trusted
``t_distribution``  what that needs of Student's t
``claims``      which differences hold, and the sentence that says so
``tables``      every table of RESULTS.md and report.html
``report``      RESULTS.md, its plots and report.html
"""
