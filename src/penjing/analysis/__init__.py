"""What planners find out by running a network on samples: costs, sensitivities, ranges, what layers can do without.

Everything here looks and calculates; only Edits (`penjing.network.edits`) change anything.
"""
