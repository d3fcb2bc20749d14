"""Writes `forest.joblib` beside this file: `python train.py`. Run it in the environment that serves, since a forest is read by the version of scikit-learn
that wrote it."""

from pathlib import Path

import joblib
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier


def main():
    digits = load_digits()
    forest = RandomForestClassifier(n_estimators=50, random_state=7).fit(digits.data, digits.target)
    joblib.dump(forest, Path(__file__).parent / "forest.joblib")


if __name__ == "__main__":
    main()
