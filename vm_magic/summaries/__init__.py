"""A notebook's objects as short texts for a language model: tables, arrays, figures, models, functions"""
