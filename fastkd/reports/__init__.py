"""What people read of a run: its report and its model card, made of these parts.

``run_report``      report.html of a run
``model_card``      README.md of a student
``page``            what all pages share: the templates' environment, notes
``descriptions``    a run in words: models, corpus, budget, how far it came
``expenses``        tables of what the budget was spent on
``learning_curves`` plots and tables of how the run learned
``tables``          a table, as Markdown here and as HTML in templates/tables.html
``plots``, ``bars`` curves, scores and stacked bars as SVG
"""
