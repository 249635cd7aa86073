"""Blade images: recipes (data in images/), a content-addressed cache, and the steps that build one."""
