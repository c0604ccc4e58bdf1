"""How should adapters be combined, and who be asked for what?  python -m bench.strategies aggregators|fleets [key=value …]

    aggregators  every rule × heterogeneity: equal and mixed ranks, half the fleet on half the sites, label skew, few
                 and many writers, with and without privacy (`bench.aggregators`)
    fleets       selection and planning × fleet, in simulated hours, kWh and flat batteries; asynchronous rounds
                 (`bench.fleets`)
    page         docs/strategies.md from what the others, and `bench.robustness`, have written

Test writers are looked at once. `--tune` runs on development writers, and writes no result.
"""
