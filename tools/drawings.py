"""Drawings of landscapes, as different from each other as photographs of one kind of place are."""

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = WIDTH, HEIGHT = 480, 360
Color = tuple[int, int, int]
Draw = ImageDraw.ImageDraw

# Of the sky, at the top and at the horizon.
SKIES: dict[str, tuple[Color, Color]] = {
    "day": ((70, 140, 220), (200, 228, 248)),
    "dawn": ((90, 110, 190), (255, 205, 170)),
    "sunset": ((70, 40, 110), (255, 140, 70)),
    "overcast": ((140, 150, 162), (205, 210, 215)),
    "night": ((8, 12, 40), (40, 50, 100)),
}


def shaded(color: Color, random: Random, spread: int = 18) -> Color:
    """Returns a color like this one."""
    change = random.randint(-spread, spread)
    red, green, blue = (max(0, min(255, value + change + random.randint(-8, 8))) for value in color)
    return red, green, blue


def gradient(top: Color, bottom: Color, height: int) -> Image.Image:
    mask = Image.linear_gradient("L").resize((WIDTH, height))
    return Image.composite(Image.new("RGB", (WIDTH, height), bottom), Image.new("RGB", (WIDTH, height), top), mask)


def ridge(draw: Draw, random: Random, base: float, roughness: float, color: Color) -> None:
    """Draws hills from the left to the right, down to the bottom."""
    waves = [(random.uniform(0.5, 4), random.uniform(0, 7), random.uniform(0.2, 1)) for _ in range(5)]
    points = [
        (x, base - roughness * sum(a * math.sin(f * x / WIDTH * 6 + p) for f, p, a in waves) / 2)
        for x in range(0, WIDTH + 8, 8)
    ]
    draw.polygon([(0, HEIGHT), *points, (WIDTH + 8, HEIGHT)], fill=color)


def sky(picture: Image.Image, random: Random, kinds: list[str]) -> str:
    kind = random.choice(kinds)
    top, bottom = (shaded(color, random) for color in SKIES[kind])
    picture.paste(gradient(top, bottom, HEIGHT), (0, 0))
    draw = ImageDraw.Draw(picture)
    x, y, r = random.randint(40, WIDTH - 40), random.randint(40, 130), random.randint(14, 26)
    if kind == "night":
        for _ in range(90):
            draw.point((random.randint(0, WIDTH), random.randint(0, 220)), (230, 230, 210))
    if kind != "overcast":
        color = {"night": (235, 235, 215), "sunset": (255, 225, 150)}.get(kind, (255, 244, 190))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    for _ in range(random.randint(0, 4) if kind in ("day", "dawn", "overcast") else 0):
        x, y = random.randint(-20, WIDTH), random.randint(20, 120)
        for _ in range(6):
            dx, dy, r = random.randint(0, 80), random.randint(-8, 8), random.randint(10, 22)
            draw.ellipse((x + dx, y + dy, x + dx + 2 * r, y + dy + r), fill=shaded((238, 240, 244), random, 6))
    return kind


def beach(picture: Image.Image, random: Random) -> None:
    kind = sky(picture, random, ["day", "day", "sunset", "dawn"])
    horizon, shore = random.randint(150, 190), random.randint(240, 290)
    sea = {"sunset": (120, 90, 110)}.get(kind, (30, 130, 170))
    picture.paste(gradient(shaded(sea, random), shaded((110, 190, 190), random), HEIGHT - horizon), (0, horizon))
    draw = ImageDraw.Draw(picture)
    ridge(draw, random, shore, 8, (245, 245, 240))
    ridge(draw, random, shore + 8, 8, shaded((228, 204, 150), random))
    for _ in range(random.randint(0, 3)):
        x, y = random.randint(20, WIDTH - 60), random.randint(horizon, horizon + 40)
        draw.polygon([(x, y + 12), (x + 40, y + 12), (x + 32, y + 20), (x + 8, y + 20)], fill=(120, 70, 50))
        draw.polygon([(x + 18, y + 10), (x + 18, y - 28), (x + 38, y + 10)], fill=(250, 250, 250))
    for _ in range(random.randint(0, 2)):
        x, y = random.randint(30, WIDTH - 60), random.randint(shore + 5, HEIGHT - 40)
        draw.line((x, y, x, y + 40), fill=(90, 60, 40), width=3)
        draw.pieslice((x - 32, y - 22, x + 32, y + 30), 180, 360, fill=shaded((210, 60, 60), random, 60))


def mountains(picture: Image.Image, random: Random) -> None:
    sky(picture, random, ["day", "dawn", "overcast", "sunset"])
    draw = ImageDraw.Draw(picture)
    for _ in range(random.randint(3, 5)):
        x, peak, half = random.randint(0, WIDTH), random.randint(70, 150), random.randint(120, 200)
        draw.polygon([(x - half, 280), (x, peak), (x + half, 280)], fill=shaded((95, 100, 118), random))
        snow = random.uniform(0.2, 0.4)
        foot = peak + (280 - peak) * snow
        draw.polygon(
            [(x - half * snow, foot), (x, peak), (x + half * snow, foot), (x, foot - 14)], fill=(242, 246, 250)
        )
    ridge(draw, random, 270, 16, shaded((62, 96, 70), random))
    if random.random() < 0.5:
        draw.rectangle((0, 300, WIDTH, HEIGHT), fill=shaded((70, 120, 150), random))


def forest(picture: Image.Image, random: Random) -> None:
    sky(picture, random, ["day", "overcast", "dawn"])
    draw = ImageDraw.Draw(picture)
    ridge(draw, random, 230, 18, shaded((60, 100, 60), random))
    autumn = random.random() < 0.3
    for y in range(220, HEIGHT + 60, 14):
        for _ in range(9):
            x, height = random.randint(-10, WIDTH), random.randint(60, 120)
            color = shaded((190, 110, 40) if autumn and random.random() < 0.6 else (35, 92, 50), random, 24)
            for step in range(3):
                half, top = height * (0.16 + 0.07 * step), y - height + step * height * 0.28
                draw.polygon([(x - half, top + height * 0.42), (x, top), (x + half, top + height * 0.42)], fill=color)


def desert(picture: Image.Image, random: Random) -> None:
    sky(picture, random, ["day", "day", "sunset", "dawn"])
    draw = ImageDraw.Draw(picture)
    for step in range(4):
        ridge(draw, random, 200 + 42 * step, 26, shaded((214 - 8 * step, 158 - 6 * step, 92), random))
    for _ in range(random.randint(0, 5)):
        x, y, height = random.randint(20, WIDTH - 20), random.randint(230, HEIGHT - 10), random.randint(40, 80)
        green = shaded((60, 118, 70), random)
        draw.line((x, y, x, y - height), fill=green, width=11)
        for side in (-1, 1):
            arm = y - height * random.uniform(0.4, 0.6)
            draw.line([(x, arm), (x + side * 18, arm), (x + side * 18, arm - 24)], fill=green, width=8)


def city(picture: Image.Image, random: Random) -> None:
    kind = sky(picture, random, ["night", "sunset", "day", "overcast"])
    draw = ImageDraw.Draw(picture)
    for base in ((70, 74, 96), (48, 52, 72)):
        x = -10
        while x < WIDTH:
            width, top = random.randint(28, 66), random.randint(80, 230)
            draw.rectangle(
                (x, top, x + width, HEIGHT), fill=shaded(base if kind == "night" else (112, 118, 130), random)
            )
            for wx in range(x + 5, x + width - 6, 10):
                for wy in range(top + 8, HEIGHT, 14):
                    if random.random() < 0.6:
                        draw.rectangle(
                            (wx, wy, wx + 4, wy + 7), fill=(250, 220, 130) if kind == "night" else (170, 190, 205)
                        )
            x += width + random.randint(0, 6)


def meadow(picture: Image.Image, random: Random) -> None:
    sky(picture, random, ["day", "day", "dawn", "overcast"])
    draw = ImageDraw.Draw(picture)
    for step in range(3):
        ridge(draw, random, 190 + 40 * step, 16, shaded((110 - 12 * step, 168 - 10 * step, 70), random))
    bloom = random.choice([(235, 70, 80), (250, 210, 60), (200, 110, 210), (250, 250, 250)])
    for _ in range(random.randint(150, 400)):
        y = random.randint(230, HEIGHT)
        x, r = random.randint(0, WIDTH), 1 + (y - 220) // 40
        draw.ellipse((x - r, y - r, x + r, y + r), fill=shaded(bloom, random, 14))
    for _ in range(random.randint(0, 3)):
        x, y, r = random.randint(30, WIDTH - 30), random.randint(190, 240), random.randint(22, 40)
        draw.rectangle((x - 4, y, x + 4, y + 50), fill=(96, 66, 44))
        draw.ellipse((x - r, y - r, x + r, y + r * 0.7), fill=shaded((52, 120, 52), random))


SCENES: dict[str, Callable[[Image.Image, Random], None]] = {
    "Beach": beach,
    "City": city,
    "Desert": desert,
    "Forest": forest,
    "Meadow": meadow,
    "Mountains": mountains,
}


def draw_landscape(scene: str, seed: int) -> Image.Image:
    """Returns a landscape of 480×360 pixels, always the same one for a scene and a seed."""
    random = Random(f"{scene} {seed}")
    picture = Image.new("RGB", SIZE)
    SCENES[scene](picture, random)
    noise = Image.frombytes("L", (WIDTH // 2, HEIGHT // 2), random.randbytes(WIDTH * HEIGHT // 4))
    grain = noise.point(lambda value: 96 + value // 4).resize(SIZE).convert("RGB")
    grained = ImageChops.overlay(picture.filter(ImageFilter.GaussianBlur(0.6)), grain)
    return Image.blend(picture, grained, 0.5)
