// Draws a made-up group of many states and edges in the page.
async () => {
    const { draw } = await import('/static/js/graph.js');
    let seed = 7;
    const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
    const steps = (n) => Array.from({ length: n }, (_, i) => ({ member: i, action: 'a' }));
    const layers = [0, 1, 1, 1, 2, 2, 2, 2, 6, 6, 6, 6, 6, 7, 7, 9, 9, 9];
    const states = layers.map((layer, state) => ({ state, layer, steps: steps(1 + random(9)), mean_return: 0, observation: '' }));
    const edges = Array.from({ length: 60 }, (_, i) => ({
        source: random(states.length), target: i % 9 ? random(states.length) : null, outcome: i % 9 ? null : i % 2 ? 'won' : 'lost',
        action: `a${i}`, count: 1 + random(6), step_advantage: random(3) - 1, members: [0],
    }));
    const view = draw({ states, edges }, { chosen: null, member: null, pick() {}, room: 900, value: (edge) => edge.step_advantage });
    document.querySelector('main').replaceChildren(view);
}
