"""The blind baseline: the same questions, with other problems' pictures.

What a model answers right without its own picture it knows from the question, the task's habits or
by chance. Only what it has above that is seen: a run may learn without looking, and its accuracy
rises all the same.
"""

from dataclasses import replace

from evaluation.significance import paired_difference, wilson_interval, with_interval


def with_others_pictures(problems):
    """The Problems that show something, each with the images of the next one that shows something
    else, round in a circle, as (index, Problem). Nothing where all show the same."""
    showing = [i for i, problem in enumerate(problems) if problem.images]
    blind = []
    for place, i in enumerate(showing):
        for other in [*showing[place + 1 :], *showing[:place]]:
            if repr(problems[other].images) != repr(problems[i].images):
                blind.append((i, replace(problems[i], images=problems[other].images)))
                break
    return blind


def blind_figures(records):
    """Accuracy without the own picture and what there is above it, with their 95 % intervals, of
    the records that were asked blindly too; {} where none was."""
    asked = [record for record in records if "blind_correct" in record]
    if not asked:
        return {}
    blind = [record["blind_correct"] for record in asked]
    count, bounds = sum(blind), wilson_interval(sum(blind), len(blind))
    above = paired_difference(blind, [record["correct"] for record in asked])
    return {
        **with_interval("blind_accuracy", count / len(blind), *bounds),
        **with_interval("above_blind", *above),
    }
