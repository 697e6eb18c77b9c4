// Reports of our nodes, drawn at their lower end. They are kept in the node's properties, so that they are there after a
// reload of the page: for a node whose outputs it takes from its cache, the host sends no results again. Once a widget or
// a wire of the node is another than when its report was made, the report is dimmed and says so, until the next run.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const REPORT = "controlnext_report"; // key of the results, of the properties, and name of the widget
const MADE_FOR = "controlnext_report_for"; // of the properties: the node's settings when it was queued
const EARLIER = "From a run before the last change:";
const LETTER = 5.9, LINE = 15, EDGE = 8, LINES = 8; // of the text, in units of the page; more lines than LINES scroll

const WIDE = [
    "ControlNeXtLoader", "ControlNetXSLoader", "ControlNeXtUNetLoader", "ControlNeXtInspect", "ControlDatasetFolder",
];
const WIDTH = 455; // of nodes that show names of files

function isOurs(nodeData) {
    return Boolean(nodeData?.category?.startsWith("ControlNeXt"));
}

function inputsOf(nodeData) {
    return { ...nodeData.input?.required, ...nodeData.input?.optional };
}

function settingsOf(node) {
    const inputs = inputsOf(node.constructor.nodeData);
    const values = (node.widgets ?? []).filter((widget) => widget.name in inputs).map((widget) => widget.value);
    const wires = (node.inputs ?? []).map((_, slot) => node.getInputLink(slot)).filter(Boolean);
    return JSON.stringify([values, wires.map((wire) => [wire.target_slot, String(wire.origin_id), wire.origin_slot])]);
}

function isEarlier(node) {
    const madeFor = node.properties[MADE_FOR]; // none in graphs of older versions
    return madeFor !== undefined && madeFor !== settingsOf(node);
}

function textOf(node) {
    const text = node.properties?.[REPORT] ?? "";
    return text && isEarlier(node) ? `${EARLIER}\n${text}` : text;
}

function heightOf(text, width) {
    const lines = text.split("\n").map((line) => Math.max(1, Math.ceil((line.length * LETTER) / (width - 36))));
    return EDGE + LINE * Math.min(LINES, lines.reduce((sum, count) => sum + count, 0));
}

function makeElement() {
    const element = document.createElement("div");
    element.className = REPORT;
    Object.assign(element.style, {
        boxSizing: "border-box", padding: "4px 8px", overflow: "auto", whiteSpace: "pre-wrap", overflowWrap: "anywhere",
        fontSize: "11px", lineHeight: `${LINE}px`, color: "var(--input-text)", userSelect: "text",
    });
    return element;
}

function fill(element, text) {
    element.replaceChildren(...text.split("\n").map((line) => {
        const row = document.createElement("div");
        row.textContent = line;
        if (line.startsWith("Warning: ")) row.style.color = "#f0b040";
        return row;
    }));
}

function addWidget(node) {
    const element = makeElement();
    const kept = () => textOf(node);
    const widget = node.addDOMWidget(REPORT, REPORT, element, {
        serialize: false, // neither saved with the values nor sent to the host
        getValue: kept,
        setValue: () => {},
        getMinHeight: () => heightOf(kept(), node.size[0]),
    });
    widget.serialize = false;
    return widget;
}

function show(node) {
    const text = textOf(node);
    let widget = node.widgets?.find((each) => each.name === REPORT);
    if (!text) {
        if (widget) node.removeWidget(widget);
        return;
    }
    widget ??= addWidget(node);
    fill(widget.element, text);
    widget.element.style.opacity = text.startsWith(EARLIER) ? 0.55 : 1;
    widget.element.style.minHeight = `${heightOf(text, node.size[0])}px`;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    node.setDirtyCanvas?.(true, true);
}

function watch(node) {
    for (const widget of node.widgets ?? []) {
        after(widget, "callback", () => show(node));
        after(widget, "beforeQueued", () => { node.queuedFor = settingsOf(node); });
    }
}

let unsaved = false; // a report came that the page's own copy of the graph lacks

function keepWithGraph() { // the page keeps that copy for its next start when a tracker sees a change
    if (!unsaved) return;
    unsaved = false;
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    if (tracker?.captureCanvasState) tracker.captureCanvasState();
    else tracker?.checkState?.(); // as older pages call it
}

function hideUnusedWidgets(node, nodeData) {
    const inputs = inputsOf(nodeData);
    const advanced = (node.widgets ?? []).filter((widget) => inputs[widget.name]?.[1]?.advanced);
    const unused = advanced.every((widget) => widget.value === inputs[widget.name][1].default); // older graphs use some
    for (const widget of advanced) {
        widget.hidden = unused; // in the older renderer; Nodes 2.0 folds advanced widgets itself
        if (unused) widget.computeSize = () => [0, -4]; // else they keep their room
        else delete widget.computeSize;
    }
    if (advanced.length) node.showAdvanced = !unused;
    return advanced.length > 0;
}

function after(object, name, act) {
    const before = object[name];
    object[name] = function (...given) {
        const result = before?.apply(this, given);
        act(this, ...given);
        return result;
    };
}

const USES = { ControlNeXtLoader: 2, ControlNeXtApply: 1, ControlNeXtVideoWindows: 1 };

// The page ranks equally good names by how often people use them, then by their length: for "ControlNeXt" Save, Apply,
// Train, and for "video" ours behind the 64 nodes that it shows. Here some of ours count as used once or twice, behind
// every node that people use more often; the one for clips for words inside its name alone.
function rankSearch() {
    const definition = LiteGraph.registered_node_types.ControlNeXtApply?.nodeData;
    const prototype = definition && Object.getPrototypeOf(definition);
    const before = prototype?.postProcessSearchScores;
    if (!before) return;
    prototype.postProcessSearchScores = function (scores) { // [kind of match, minus uses, ...]
        const [kind, uses, ...others] = before.call(this, scores);
        const counts = this.name === "ControlNeXtVideoWindows" ? kind === 2 : kind <= 3; // 1: at its start, 3: inside a word
        return [kind, counts ? Math.min(uses, -(USES[this.name] ?? 0)) : uses, ...others];
    };
}

app.registerExtension({
    name: "comfyuicontrolnext.reports",
    setup() {
        rankSearch();
        for (const end of ["execution_success", "execution_error"]) api.addEventListener(end, keepWithGraph);
    },
    nodeCreated(node) {
        const nodeData = node.constructor.nodeData;
        if (!isOurs(nodeData)) return;
        const height = hideUnusedWidgets(node, nodeData) ? node.computeSize()[1] : node.size[1];
        const width = WIDE.includes(node.comfyClass) ? WIDTH : 0;
        node.setSize([Math.max(node.size[0], width), height]);
        watch(node);
    },
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!isOurs(nodeData)) return;
        after(nodeType.prototype, "onExecuted", (node, results) => {
            if (!results || !(REPORT in results)) return;
            node.properties[REPORT] = results[REPORT].join("\n");
            node.properties[MADE_FOR] = node.queuedFor ?? settingsOf(node);
            unsaved = true;
            show(node);
        });
        after(nodeType.prototype, "onConnectionsChange", (node) => queueMicrotask(() => show(node)));
        after(nodeType.prototype, "onConfigure", (node) => { // has its widgets' values again
            show(node);
            hideUnusedWidgets(node, nodeData);
        });
    },
});
