"""Which tokens may follow: grammars, thinking budgets, repetition."""
