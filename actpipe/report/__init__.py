"""Every result of a run as one page that stands alone. Only here: plotly, jinja2."""
