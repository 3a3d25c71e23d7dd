""" Figures of the paper (arXiv 2207.10255) that ours stand beside. """
from typing import Dict, Optional, Tuple

# Table 1: top-1 in percent, by data set and type
TOP1 = {
    'cifar10': dict(conv=94.17, i=93.91, ii=92.25, iii=92.52, iv=93.38),
    'cifar100': dict(conv=73.92, i=72.88, ii=70.44, iii=70.89, iv=71.75),
    'flowers102': dict(conv=60.47, i=62.03, ii=59.33, iii=59.00, iv=61.51),
    'food101': dict(conv=74.59, i=73.56, ii=71.74, iii=72.78, iv=72.92),
}


def kind_of(arch: str) -> str:
    """ Type of an architecture, as the tables here have it."""
    return arch.split('_')[1] if arch.startswith('splitmixer') else 'conv'


def top1(name: str) -> Optional[float]:
    """ Top-1 in percent of 'arch.tag', None where the paper has none, or the tag's recipe is not the paper's."""
    arch, _, tag = name.partition('.')
    return TOP1.get(tag, {}).get(kind_of(arch))


# Its comparison, from Lv et al. 2022 (200 epochs): by data set and model, parameters in millions and top-1 in percent
PEERS: Dict[str, Dict[str, Tuple[float, float]]] = {
    'cifar10': {
        'ResNet20': (0.27, 91.99), 'ViT': (2.69, 86.57), 'AS-MLP': (26.20, 87.30), 'gMLP': (4.61, 86.79),
        'ResMLP': (14.30, 86.52), 'ViP': (29.30, 88.97), 'MLP-Mixer': (17.10, 85.45), 'MDMLP': (0.30, 90.90),
    },
    'cifar100': {
        'ResNet20': (0.27, 67.39), 'ViT': (2.69, 60.43), 'AS-MLP': (26.20, 65.16), 'gMLP': (4.61, 61.60),
        'ResMLP': (14.30, 61.40), 'ViP': (29.30, 70.51), 'MLP-Mixer': (17.10, 55.06), 'MDMLP': (0.30, 64.22),
    },
}

# Table 3: by model and arguments, what the paper calls it and its images a second on a Tesla V100 32 GB
TABLE3 = {
    ('convmixer_256_8_ks7_p7', ''): ('ConvMixer', 815.84),
    ('splitmixer_i_256_8_ks7_p7', ''): ('I, α = 2/3', 2097.55),
    ('splitmixer_i_256_8_ks7_p7', 'overlap_ratio=3/5'): ('I, α = 3/5', 2208.40),
    ('splitmixer_i_256_8_ks7_p7', 'overlap_ratio=4/7'): ('I, α = 4/7', 2210.06),
    ('splitmixer_i_256_8_ks7_p7', 'overlap_ratio=5/9'): ('I, α = 5/9', 2220.09),
    ('splitmixer_i_256_8_ks7_p7', 'overlap_ratio=6/11'): ('I, α = 6/11', 2231.42),
    ('splitmixer_ii_256_8_ks7_p7', ''): ('II, s = 2', 2322.02),
    ('splitmixer_ii_256_8_ks7_p7', 'num_segments=3'): ('II, s = 3', 2291.44),
    ('splitmixer_ii_256_8_ks7_p7', 'num_segments=4'): ('II, s = 4', 2440.16),
    ('splitmixer_ii_256_8_ks7_p7', 'num_segments=5'): ('II, s = 5', 2464.33),
    ('splitmixer_ii_256_8_ks7_p7', 'num_segments=6'): ('II, s = 6', 2474.318),
    ('splitmixer_iii_256_8_ks7_p7', ''): ('III, s = 2', 2112.290),
    ('splitmixer_iii_256_8_ks7_p7', 'num_segments=4'): ('III, s = 4', 2171.70),
    ('splitmixer_iii_256_8_ks7_p7', 'num_segments=8'): ('III, s = 8', 2185.61),
    ('splitmixer_iv_256_8_ks7_p7', ''): ('IV, s = 2', 2110.92),
    ('splitmixer_iv_256_8_ks7_p7', 'num_segments=3'): ('IV, s = 3', 2084.55),
    ('splitmixer_iv_256_8_ks7_p7', 'num_segments=4'): ('IV, s = 4', 2170.57),
    ('splitmixer_iv_256_8_ks7_p7', 'num_segments=5'): ('IV, s = 5', 2146.76),
}
BASELINE = ('convmixer_256_8_ks7_p7', '')
