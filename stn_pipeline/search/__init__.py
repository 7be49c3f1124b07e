"""Optuna, and nothing else imports it: the sweep file, the study, the sweep around it, its pictures."""
