"""Visual patterns: sets of filters of the last convolution that fire at one place, in images of one class.

H. Li, J. G. Ellis, L. Zhang, S.-F. Chang, "PatternNet: Visual Pattern Mining with Deep Neural Network", ICMR 2018,
arXiv 1703.06339. Filters of the last convolution detect parts; a fully connected layer on "has it fired anywhere" says
which of them speak for a class, and sets of those that fire together are patterns, found without sampling patches:

    r_n = max over positions of a_n,    g_n = sigmoid(β_n (r_n − t_n)),    z = W g + b          a_n: maps after the ReLU
    m_n(u) = [a_n(u) > q_n],            V_P(u) = Σ_{n in P} m_n(u) ≥ m                          q_n: 0.9 quantile of a_n

Cost: (C + 2) N + C parameters for N filters and C classes; one pass of the network, one comparison a response, and set
growth on packed bits, at most (K choose s) ANDs of B·H·W/64 words for a class.
"""

from torchconv.analysis._patternnet_geometry import Geometry, receptive_field
from torchconv.analysis._patternnet_head import PatternNetHead, class_filters, fit_head
from torchconv.analysis._patternnet_maps import (
    FeatureMaps,
    Located,
    binarise,
    binarise_thresholds,
    locate,
    respond,
    supports,
    votes,
)
from torchconv.analysis._patternnet_mining import (
    Mining,
    Pattern,
    bag_of_patterns,
    basic_patterns,
    classify_by_patterns,
    largest_responses,
    mine_patterns,
)
from torchconv.analysis._patternnet_regions import Proposals, propose
from torchconv.analysis._patternnet_section import Study, draw_patterns, section, study_patterns
from torchconv.analysis._patternnet_sets import frequent_sets, iou

__all__ = [
    "FeatureMaps",
    "Geometry",
    "Located",
    "Mining",
    "Pattern",
    "PatternNetHead",
    "Proposals",
    "Study",
    "bag_of_patterns",
    "basic_patterns",
    "binarise",
    "binarise_thresholds",
    "class_filters",
    "classify_by_patterns",
    "draw_patterns",
    "fit_head",
    "frequent_sets",
    "iou",
    "largest_responses",
    "locate",
    "mine_patterns",
    "propose",
    "receptive_field",
    "respond",
    "section",
    "study_patterns",
    "supports",
    "votes",
]
