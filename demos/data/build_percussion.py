"""Drums, small percussion and other short sounds with names: a part of build_starter.py.

The drum kits and sound effects of the soundfonts that the notes come from, named as in the key map of General MIDI, and recordings of
Sonic Pi. Held out for testing: some takes of each name with enough of them (takes that sound alike stay on the same side of the
split), and takes of the soundfont that is also held out for notes.
"""
import collections
import random

import numpy as np
from build_starter import DEB as NOTES
from build_starter import MORE_SOUNDFONTS, RATE, SEED, UNSEEN_SOUNDFONT, Player, encode_ogg, write_tar

DEB = [*(name for name in NOTES if "soundfont" in name), "sonic-pi-samples"]
KEYS = {  # keys of channel 10 of General MIDI; similar variants share a name
    "a bass drum": (35, 36), "a side stick": (37,), "a snare drum": (38, 40), "a hand clap": (39,), "a low tom": (41, 43, 45),
    "a closed hi-hat": (42,), "a pedal hi-hat": (44,), "an open hi-hat": (46,), "a mid tom": (47, 48), "a crash cymbal": (49, 57),
    "a high tom": (50,), "a ride cymbal": (51, 59), "a chinese cymbal": (52,), "a ride bell": (53,), "a tambourine": (54,),
    "a splash cymbal": (55,), "a cowbell": (56,), "a vibraslap": (58,), "a high bongo": (60,), "a low bongo": (61,),
    "a high conga": (62, 63), "a low conga": (64,), "a high timbale": (65,), "a low timbale": (66,), "a high agogo": (67,),
    "a low agogo": (68,), "a cabasa": (69,), "maracas": (70,), "a short whistle": (71,), "a long whistle": (72,),
    "a short guiro": (73,), "a long guiro": (74,), "claves": (75,), "a high wood block": (76,), "a low wood block": (77,),
    "a mute cuica": (78,), "an open cuica": (79,), "a mute triangle": (80,), "an open triangle": (81,)}
KITS = (0, 8, 16, 24, 25, 32, 40)  # standard, room, power, electronic, TR-808, jazz, brush
EFFECTS = {"a taiko drum": 116, "a melodic tom": 117, "a synth drum": 118, "a reverse cymbal": 119, "guitar fret noise": 120,
           "breath noise": 121, "a seashore": 122, "a bird tweet": 123, "a telephone ring": 124, "a helicopter": 125,
           "applause": 126, "a gunshot": 127}
EFFECT_KEYS = (48, 55, 60, 67)
RECORDINGS = {  # of Sonic Pi: prefixes of its file names
    "a bass drum": ("bd_", "drum_bass", "drum_heavy_kick", "elec_hollow_kick", "elec_soft_kick"),
    "a snare drum": ("sn_", "drum_snare", "elec_snare", "elec_hi_snare", "elec_lo_snare", "elec_mid_snare", "elec_filt_snare"),
    "a closed hi-hat": ("drum_cymbal_closed",), "an open hi-hat": ("drum_cymbal_open",), "a pedal hi-hat": ("drum_cymbal_pedal",),
    "a crash cymbal": ("drum_cymbal_hard", "drum_cymbal_soft"), "a splash cymbal": ("drum_splash",), "a cowbell": ("drum_cowbell",),
    "a high tom": ("drum_tom_hi",), "a mid tom": ("drum_tom_mid",), "a low tom": ("drum_tom_lo",), "a drum roll": ("drum_roll",),
    "a tabla": ("tabla_",), "a bell": ("perc_bell", "elec_bell", "elec_chime"), "a finger snap": ("perc_snap",),
    "a door": ("perc_door",), "a till": ("perc_till",), "a crow": ("misc_crow",), "a burp": ("misc_burp",),
    "a swoosh": ("perc_swoosh", "perc_swash", "ambi_swoosh"), "an open triangle": ("elec_triangle",),
    "a beep": ("elec_beep", "elec_blip", "elec_ping"), "a robot": ("mehackit_robot", "glitch_robot"),
    "a telephone": ("mehackit_phone",), "a record scratch": ("vinyl_scratch",),
    "a record rewinding": ("vinyl_rewind", "vinyl_backspin")}
SECONDS, ALIKE, MOST = 1.5, 0.9, 12  # MOST: training takes per name, tripled where there are recordings


def finish(wave):
    """Trimmed to what is within 50 dB of the peak, at most SECONDS; faded out, peak 0.7."""
    peak = np.abs(wave).max()
    if peak < 1e-3:
        return None
    loud = np.flatnonzero(np.abs(wave) > peak / 316)
    wave = wave[max(0, loud[0] - 80):][:round(SECONDS * RATE)]
    wave = wave[:max(RATE // 4, loud[-1] - max(0, loud[0] - 80))].copy()
    wave[-400:] *= np.linspace(1, 0, len(wave[-400:]))
    return (0.7 * wave / np.abs(wave).max()).astype(np.float32)


def play(player, bank, program, key, hold):
    from scipy.signal import resample_poly
    synth = player.synth
    synth.sounds_off()
    synth.generate(3 * RATE // 10)
    synth.program_select(0, player.font, bank, program)
    synth.noteon(0, key, 100)
    on = np.frombuffer(synth.generate(round(hold * 3 * RATE)), np.float32).copy()
    synth.noteoff(0, key)
    off = np.frombuffer(synth.generate(round((SECONDS + 0.1 - hold) * 3 * RATE)), np.float32).copy()
    return finish(resample_poly(np.concatenate([on, off]).reshape(-1, 2).mean(1), 1, 3))


def takes_of_soundfont(path, font):
    """[(name, key of the sample, metadata, wave)]"""
    player, takes = Player(path), []
    kits = [kit for kit in KITS if player.synth.sfpreset_name(player.font, 128, kit)]
    for name, keys in KEYS.items():
        takes += [(name, f"{font}-kit{kit:03d}-{key:03d}", {"soundfont": font, "kit": kit, "midi_note": key},
                   play(player, 128, kit, key, 0.5)) for key in keys for kit in kits]
    for name, program in EFFECTS.items():
        takes += [(name, f"{font}-{program:03d}-{key:03d}", {"soundfont": font, "midi_program": program, "midi_note": key},
                   play(player, 0, program, key, 1.2)) for key in EFFECT_KEYS]
    return [take for take in takes if take[3] is not None]


def takes_of_recordings(work):
    import soundfile
    from scipy.signal import resample_poly
    takes = []
    for name, beginnings in RECORDINGS.items():
        for path in sorted((work / "deb/sonic-pi-samples/usr/share/sonic-pi/samples").glob("*.flac")):
            if path.stem.startswith(beginnings):
                wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
                wave = finish(resample_poly(wave[:3 * rate].mean(1), RATE, rate))
                takes.append((name, "sonic-pi-" + path.stem.replace("_", "-"), {"recording": f"Sonic Pi {path.stem}"}, wave))
    return takes


def groups_of(takes):
    """Groups of takes that sound alike: the first half second correlates with that of another take of the group by at least ALIKE."""
    starts = [np.pad(wave[:RATE // 2], (0, max(0, RATE // 2 - len(wave)))) for *_, wave in takes]
    unit = np.stack([start / np.linalg.norm(start) for start in starts])
    alike, group = np.abs(unit @ unit.T) >= ALIKE, list(range(len(takes)))
    for i in range(len(takes)):
        for j in np.flatnonzero(alike[i, :i]):
            old, new = group[i], group[j]
            group = [new if g == old else g for g in group]
    return [[take for take, g in zip(takes, group) if g == number] for number in sorted(set(group))]


def sample(take):
    name, key, meta, wave = take
    caption = {"caption": name, "kind": "percussion" if name in KEYS or name in RECORDINGS else "effect"}
    return key, "ogg", encode_ogg(wave, quality=0.7), {**caption, **meta, "seconds": round(len(wave) / RATE, 3)}


def build_percussion(work, out):
    fonts = {"fluid": next((work / "deb/fluid-soundfont-gm").rglob("FluidR3_GM.sf2")),
             **{name: work / "deb" / path for name, path in MORE_SOUNDFONTS.items()}}
    by_name = collections.defaultdict(list)
    for take in [*takes_of_recordings(work), *(t for font, path in fonts.items() for t in takes_of_soundfont(path, font))]:
        by_name[take[0]].append(take)
    train, test = [], []
    for name, takes in sorted(by_name.items()):
        groups = groups_of(takes)
        random.Random(f"{SEED} {name}").shuffle(groups)
        held = len(groups) // 4 if len(groups) >= 4 else 0
        test += [group[0] for group in groups[:held][:4]]       # one take of a group is enough
        train += [group[0] for group in groups[held:]][:MOST if name not in RECORDINGS else 3 * MOST]
    random.Random(SEED).shuffle(train)
    shown, others = {take[0] for take in train}, collections.defaultdict(list)
    for take in takes_of_soundfont(work / "deb" / UNSEEN_SOUNDFONT, "csound"):
        others[take[0]].append(take)
    unseen = [group[0] for name in sorted(shown & others.keys()) for group in groups_of(others[name])[:2]]
    files = {}
    for stem, takes in (("train-000", train), ("test-takes", test), ("test-soundfont", unseen)):
        file = f"sounds-percussion-{stem}.tar.gz"
        files[file] = write_tar(out / file, [sample(take) for take in takes])
    return {"files": files, "names": len(shown), "names_of_test_takes": len({take[0] for take in test}),
            "names_of_test_soundfont": len({take[0] for take in unseen})}
