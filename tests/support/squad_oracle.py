"""The official SQuAD scripts written down again: exact match and F1 of one answer."""

import re
import string


def official_tokens(text):
    for mark in string.punctuation:
        text = text.replace(mark, "")
    return [word for word in re.split(r"\b(?:a|an|the)\b|\s", text.lower()) if word]


def official_f1(gold, prediction, v2):
    gold, prediction = official_tokens(gold), official_tokens(prediction)
    if v2 and not (gold and prediction):
        return float(gold == prediction)
    rest, same = list(gold), 0
    for word in prediction:
        if word in rest:
            rest.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def official(row, prediction, v2):
    golds = row["answers"]["text"]
    if v2:
        golds = [gold for gold in golds if official_tokens(gold)] or [""]
    exact = max(float(official_tokens(gold) == official_tokens(prediction)) for gold in golds)
    return exact, max(official_f1(gold, prediction, v2) for gold in golds)
