"""Words that captions leave open about people, put in before they are drawn (CogView, arXiv 2105.13290, appendix D).

    specify("a doctor in a garden", seed=3)     ->  "a black female doctor in a garden"
    specify("花园里的医生", seed=3)               ->  "花园里的非裔女性医生"

Each noun for a person gets a word of every attribute that the caption does not tell of it, drawn with the proportions
of the list, so that many pictures of one caption come to these. Left alone is what is told already: by the words before
the noun ("an Asian doctor"; any name tells of the ethnicity, "a Lagos doctor"), by the noun itself or one beside it
("a woman doctor"), by a pronoun for the gender, by what is said right behind it ("the driver is female", "a man from
Lagos"). The paper would find the nouns by a trained model; here they are a list, so that a word of it that names no
person there is taken for one ("an adult ticket").
"""
