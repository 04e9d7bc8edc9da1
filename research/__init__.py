"""carousel: why deep and recurrent networks train. Pure functions, models, one trainer; flags live in experiments/."""
