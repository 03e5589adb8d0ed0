// Which edges of the graph pass through a state that they neither leave nor reach, or leave the picture.
() => {
    const nodes = [...document.querySelectorAll('.graph .node[data-state] circle')].map((one) => ({
        name: one.parentNode.dataset.state, x: one.cx.baseVal.value, y: one.cy.baseVal.value, r: one.r.baseVal.value }));
    const box = document.querySelector('.graph svg').viewBox.baseVal;
    const troubles = [];
    for (const edge of document.querySelectorAll('.graph .edge')) {
        const { source, target } = edge.dataset;
        for (let at = 0; at <= edge.getTotalLength(); at += 2) {
            const point = edge.getPointAtLength(at);
            if (point.y < box.y || point.y > box.y + box.height) troubles.push(`${source} ${target} leaves the picture`);
            for (const node of nodes) {
                if (node.name === source || node.name === target) continue;
                if (Math.hypot(point.x - node.x, point.y - node.y) < node.r) troubles.push(`${source} ${target} through ${node.name}`);
            }
        }
    }
    return [...new Set(troubles)];
}
