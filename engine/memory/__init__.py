"""What a model needs: cache kinds, the cost of a step, the memory plan."""
