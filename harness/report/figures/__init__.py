"""Figures from run records: vector graphics in the size and type of a venue, the same bytes for the same records.

A drawing is a module with a function `draw`. It gets the plan, the records, the tidy rows and the claims, and answers
with a picture and its caption. matplotlib is imported when a picture is drawn; torch never is.
"""

# Name of a drawing to its module. What an experiment file lists under `figures`.
DRAWINGS = {
    "pareto": "pareto",
    "bits-by-role": "bits_by_role",
    "layer-errors": "layer_errors",
    "salient-layers": "salient_layers",
    "claimed-measured": "claimed_measured",
    "ablation": "ablation",
    "lookup-size": "lookup_size",
    "weight-distribution": "weight_distribution",
    "corpora": "corpora",
    "memory": "memory",
    "roofline": "roofline",
}
